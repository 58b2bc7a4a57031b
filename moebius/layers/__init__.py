"""What a decoder is made of; no files, no process groups, no family names."""

"""Training: a plain loop over a Decoder. Import from its files; this one stays free of torch."""

"""Experts across ranks.  Import from its files; this one stays free of torch."""

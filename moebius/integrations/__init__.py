"""Moebius inside other libraries' models."""

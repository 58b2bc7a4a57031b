"""The measured suites behind `moebius bench`: each beside its peer, in the same run."""

"""A structure-aware fuzzer of opening: valid small checkpoints are damaged, opened, and what comes out is judged.

    python -m tests.fuzz --count 100000 --seed 1

A damaged checkpoint is either refused by an error that names what is wrong, or every tensor is what an independent
reading of the same files gives.  Anything else is a finding; it is written to a folder and replays by one command.
"""

"""The pluggable seam: what runs the routed experts of a layer."""

"""The data that every stage speaks: plain, frozen, packed; no I/O, no clock, imports nothing above itself."""

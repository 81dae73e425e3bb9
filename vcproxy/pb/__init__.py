"""Generated from protos/ by `make protos`, and the conversion between its messages and the model."""

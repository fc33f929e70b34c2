"""Multi-modal sequence parallelism (MM-SP): several ranks share the frames and the tokens of one long sequence."""

"""`opdlm generate`, and the decoder that it shares with `opdlm eval`."""

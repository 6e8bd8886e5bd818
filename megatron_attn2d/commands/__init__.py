"""The command `megatron-attn2d`: a file per subcommand."""

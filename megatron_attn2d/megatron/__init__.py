"""The plugin: what ties the attention to Megatron-Core, and Megatron-Core to the host that it runs on."""

"""ml_collections configs, one `get_config()` each; the docstring of each gives its command."""

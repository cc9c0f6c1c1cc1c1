"""Configs: Python files with a `get_config()` each, whose docstring gives command, devices, time and result."""

"""Configs: Python files with a `get_config()` each. Docstrings give command, devices, time and result."""

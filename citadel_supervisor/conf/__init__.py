"""What the configuration is read, checked and explained with; its sections are in `config.py`."""

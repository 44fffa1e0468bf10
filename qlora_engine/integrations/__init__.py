"""Other libraries' own ways in. Each module imports its library; nothing else of the package imports them."""

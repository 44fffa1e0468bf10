"""A pure-PyTorch twin of every operator: the definition of right, and what runs where nothing was compiled."""

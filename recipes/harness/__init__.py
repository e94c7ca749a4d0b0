"""What the recipes share: their experiments, their results files, and the page made of them."""

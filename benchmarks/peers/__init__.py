"""Other systems on the same images, written the way their own documentation writes them."""

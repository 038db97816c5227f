"""Other systems on the same images, with the code of their documentation."""

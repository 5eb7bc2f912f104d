"""The verb `report`: what run folders hold as one HTML page and its figures, made from files alone."""

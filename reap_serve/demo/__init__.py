"""The whole loop on the model that ships with the project."""

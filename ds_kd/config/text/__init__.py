"""The text of a YAML: the places of its values, their origins, and the secrets among them."""

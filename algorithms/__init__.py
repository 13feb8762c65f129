"""The methods, one file each. The name of a method is the name of its file, with dashes for underscores."""

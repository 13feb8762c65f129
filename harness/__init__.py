"""fedstill's harness: the part that runs trials. Methods live in the package `algorithms`."""

__version__ = "0.1.0"

# Raised whenever a change of the harness changes the numbers of an unchanged config: part of every trial's hash.
RULES_VERSION = 2

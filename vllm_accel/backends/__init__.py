"""One file per library: what it can do (data) and the translation of arguments. Nothing is imported from here."""

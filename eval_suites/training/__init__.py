"""How the shipped models were built, trained and checked. Runs from a checkout; not part of the installed package."""

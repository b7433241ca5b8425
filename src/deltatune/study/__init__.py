"""Studies: many training runs as cells that are run once, kept in a store and reported from it."""

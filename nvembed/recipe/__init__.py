"""The recipe: schema, document with line marks, validation, cross-checks, differences."""

"""Item indexes: specification, building, exact search and searching with exclusions. No torch here."""

"""Other training frameworks with replay. Each is imported only when it is used."""

"""The embedded tiny model: weights, loader, trainer; and the client of the clip command."""

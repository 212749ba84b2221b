"""Probes: how well a label is predicted from the vectors of a frozen model, linearly and by nearest neighbours."""

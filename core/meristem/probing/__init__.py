"""How much the vectors of a frozen model tell about a label: by a linear map, and by the nearest neighbours."""

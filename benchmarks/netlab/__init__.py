"""Gradient exchange over slow links: four hosts on one machine, joined by links of a given speed."""

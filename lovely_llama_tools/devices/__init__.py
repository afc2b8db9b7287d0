"""Several devices: how the axes of arrays are split over a mesh of them (`partition`)."""

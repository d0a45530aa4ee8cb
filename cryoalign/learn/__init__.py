"""For machine learning: layers with gradients, datasets, scikit-learn estimators."""

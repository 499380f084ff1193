"""From a trained model to answers: the bundle on disk and the predictor that reads it."""

"""GradNormLoRP: weights as magnitude times direction, whose gradient is projected."""

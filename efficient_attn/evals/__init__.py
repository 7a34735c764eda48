"""Evaluation: metrics, reports and pictures of a trained model."""

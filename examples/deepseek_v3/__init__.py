"""The Mixture-of-Experts block of DeepSeek-V3 in Flax NNX."""

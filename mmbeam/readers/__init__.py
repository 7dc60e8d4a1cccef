"""Input: from the paths a user names to windows of decoded samples."""

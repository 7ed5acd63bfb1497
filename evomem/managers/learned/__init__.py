"""Manager: scorers and policies whose parameters a search moves."""

"""What has to happen before torch is loaded. Every script imports this module first."""

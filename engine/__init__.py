"""What makes the model fast, parallel and safe. It teaches nothing about VideoMLA."""

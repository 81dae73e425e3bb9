"""The backend SDK: what a backend must do, and how it is found."""

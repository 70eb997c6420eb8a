"""What people have -> rows worth training on: the work behind the scripts of data_prep/."""

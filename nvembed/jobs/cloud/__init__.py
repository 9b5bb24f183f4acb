"""Jobs on virtual machines of a cloud, through `ray up`."""

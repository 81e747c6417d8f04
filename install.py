"""The webui runs this file at each launch, in a process of its own, for what an extension has to install.

Job Tracker needs nothing that the webui does not ship. Its files, config.json, jobs.json and images/, are made by the
extension itself: some launches do not come here, as those with --skip-install and most of SD.Next.
"""

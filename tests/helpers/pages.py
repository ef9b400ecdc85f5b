"""A page that is open in a browser."""

from __future__ import annotations

EVIL = "<script>window.hacked = 1</script>"


class Page:
    """A page that is open."""

    def __init__(self, driver, path, width=1200, dark=False):
        self.driver = driver
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        driver.get(path.as_uri())

    def run(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def one(self, selector):
        return self.driver.find_element("css selector", selector)

    def value(self, selector):
        return float(self.one(selector).get_attribute("data-value"))

    def column(self, table, number):
        cells = self.all(f"#{table} tbody tr td:nth-child({number})")
        return [cell.get_attribute("data-value") for cell in cells]

    def complaints(self):
        return self.driver.get_log("browser")

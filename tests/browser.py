"""A real browser for tests: a headless Chromium, from Debian's packages chromium and chromium-driver."""

import shutil

import pytest


PROGRAMS = {"browser": ("chromium", "chromium-browser", "google-chrome"), "driver": ("chromedriver",)}


def found(kind):
    return next((path for path in map(shutil.which, PROGRAMS[kind]) if path is not None), None)


class Browser:
    """A window on a page in a file.

    Everything else is selenium's; `script` runs JavaScript in the page and gives back what it returns.
    """

    def __init__(self):
        webdriver = pytest.importorskip("selenium.webdriver", reason="needs ponder-hf[test]")
        if found("browser") is None or found("driver") is None:
            pytest.skip("needs chromium and chromedriver: apt-get install chromium chromium-driver")
        options = webdriver.ChromeOptions()
        options.binary_location = found("browser")
        # Containers have no user namespaces for its sandbox, no GPU and little shared memory.
        for switch in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "hide-scrollbars"):
            options.add_argument(f"--{switch}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        # By its path: selenium would look for one on the network otherwise.
        service = webdriver.ChromeService(executable_path=found("driver"))
        self.driver = webdriver.Chrome(options=options, service=service)

    def open(self, path, width=1400, height=1000, dark=False):
        """Show a file in a window of this size, in the dark where that is asked for."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.driver.get(path.as_uri())

    def script(self, text, *arguments):
        return self.driver.execute_script(text, *arguments)

    def one(self, selector):
        return self.driver.find_element("css selector", selector)

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def texts(self, selector):
        """What all elements of this selector say, hidden ones included."""
        return self.script("return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)", selector)

    def complaints(self):
        """What the console said since it was last asked."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def press(self, *keys):
        """A key for whatever has the focus, while those before it are held down."""
        from selenium.webdriver.common.action_chains import ActionChains

        chain = ActionChains(self.driver)
        for key in keys[:-1]:
            chain.key_down(key)
        chain.send_keys(keys[-1])
        for key in keys[:-1]:
            chain.key_up(key)
        chain.perform()

    def point_at(self, element):
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver).move_to_element(element).perform()

    def tap(self, element):
        """A finger on an element, not a mouse."""
        place = self.script(
            "arguments[0].scrollIntoView({block: 'center'}); const r = arguments[0].getBoundingClientRect();"
            "return [r.x + r.width / 2, r.y + r.height / 2]",
            element,
        )
        points = [{"x": place[0], "y": place[1]}]
        self.driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
        for kind, touched in (("touchStart", points), ("touchEnd", [])):
            self.driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": touched})
        self.driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})

    def close(self):
        self.driver.quit()

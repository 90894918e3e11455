// Runs before the page is drawn, so that it never flashes in the other theme.
{
  const theme = localStorage.getItem("shoal.theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
}

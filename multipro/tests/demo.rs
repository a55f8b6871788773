//! What the tutorial shows in 二、multiprocessing. A change of `main` needs a change here.

use std::process::Command;

/// Twenty runs, since without `p.join()`, some runs print the lines in this order all the same.
#[test]
fn the_child_prints_between_start_and_end() {
    for _ in 0..20 {
        let run = Command::new(env!(concat!("CARGO_BIN_EXE_", env!("CARGO_PKG_NAME"))))
            .output()
            .unwrap();
        assert!(run.status.success() && run.stderr.is_empty(), "{run:?}");
        let output = String::from_utf8(run.stdout).unwrap();
        let lines: Vec<&str> = output.lines().collect();
        assert_eq!(lines.len(), 4, "not four lines: {output}");

        let parent = lines[0]
            .strip_prefix("Parent process ")
            .and_then(|line| line.strip_suffix("."))
            .expect(&output);
        assert_eq!(lines[1], "Child process will start.");
        let child = lines[2]
            .strip_prefix("Run child process test (")
            .and_then(|line| line.strip_suffix(")..."))
            .expect(&output);
        assert_eq!(lines[3], "Child process end.");
        assert_ne!(child, parent, "run_proc ran in the parent");
    }
}

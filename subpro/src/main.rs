//! A parent runs other programs, and waits for each to end.
//!
//! The tutorial's section 四、subprocess, `demo2/subpro.py`.
//! Run it with `cargo run -p subpro`.

use std::fmt;
use std::io::{self, Write};
use std::process::Command;

fn main() -> Result<(), Error> {
    let _r = Command::new("/bin/sh")
        .args(["-c", "ps -aux|grep python"])
        .status()
        .map_err(failed("run /bin/sh"))?;

    println!("---------------");
    io::stdout().flush().map_err(failed("flush"))?; // before ls prints

    let _r2 = Command::new("ls")
        .args(["-l"])
        .status()
        .map_err(failed("run ls"))?;

    println!("---------------");
    io::stdout().flush().map_err(failed("flush"))?; // before ping prints

    let mut r3 = Command::new("ping")
        .args(["-c", "4", "www.baidu.com"])
        .spawn()
        .map_err(failed("run ping"))?;
    r3.wait().map_err(failed("wait for ping"))?; // Let the parent wait until the child has ended
    Ok(())
}

// What Python brings along:

/// Stands in for an exception that ends the program: what went wrong, in one line.
struct Error(String);

/// `main` shows the error that it returns by `Debug`, so that is the line as it stands.
impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Makes an [`Error`] of a cause by saying what failed.
fn failed<E: fmt::Display>(what: &str) -> impl FnOnce(E) -> Error {
    move |cause| Error(format!("{what}: {cause}"))
}
